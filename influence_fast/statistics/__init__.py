"""Statistics on plain arrays: ranks, intervals, bootstraps and tests, each in one place."""
