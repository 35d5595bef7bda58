"""The web server: OpenAI's API and the chat page in one process, the models in worker processes."""
