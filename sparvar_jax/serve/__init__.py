"""Pictures over HTTP: one loaded pipeline behind the OpenAI images API, a page, and replicas."""
