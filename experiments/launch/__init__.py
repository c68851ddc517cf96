"""What a command does before its work: parse and check settings, join hosts, make the mesh and the run folder."""
