"""Statistics on the people who label: agreement, screening, biases, and a report on a comparison store."""
