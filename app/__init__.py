"""The edge of the system: arguments, HTTP, A/B routing, feedback, and the command line."""
