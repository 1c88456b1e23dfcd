"""Profile -> plan -> search: settings that suit this storage and this state."""
