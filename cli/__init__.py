"""The command line: one click command a file; each parses, calls one function and prints."""
