"""Sources of training text: the download of the public corpus and the user's own files; writing shards."""
