"""Where training text comes from: the public shards' host, and the user's own files."""
