"""Claims of Anthropic's helpful and harmless assistants."""
