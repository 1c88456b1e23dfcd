"""The processes of one job: how they meet, agree and wait for each other, and what interrupts them."""
