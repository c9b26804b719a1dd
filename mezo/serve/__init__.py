"""One SGLang engine that answers users over HTTP and is trained on meanwhile."""
