"""Claims about feedback of models: constitutional AI."""
