"""The terminal chat: the conversation and its prompts, input and output, the interactive loop."""
