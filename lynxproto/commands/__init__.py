"""Commands of the command line that run sessions: send, recv, serve, fetch, config."""
