"""Before the cluster is rented: what a schedule and a retention do to a job."""
