"""One store built by many processes on any number of hosts."""
