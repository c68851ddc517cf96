"""Start-up code of all commands: parses and checks settings, joins hosts, makes the mesh and the run folder."""
