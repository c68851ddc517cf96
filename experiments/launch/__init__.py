"""Start-up code of all commands: parses and checks settings, connects hosts, creates the mesh and the run folder."""
