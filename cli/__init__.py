"""The `millpond` command and the entry points of the daemons."""
