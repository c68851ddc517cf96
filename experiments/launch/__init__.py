"""From a command line to a run folder: settings, checks, hosts, mesh and the initial model."""
