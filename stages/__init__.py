"""Serving: what each stage of a request does, and the Serve deployments around it."""
