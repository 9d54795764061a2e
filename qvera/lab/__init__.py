"""Research methods beside the core: adapters, schedules and `qvera analyze`, which register by entry points."""
