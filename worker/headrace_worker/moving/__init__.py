"""KV on its way from the worker that computes a prompt to the one that goes on with the job."""
