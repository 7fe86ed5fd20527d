"""A client for OpenAI-compatible chat endpoints: the judge of rewards and the rollouts of curation ask by it."""
