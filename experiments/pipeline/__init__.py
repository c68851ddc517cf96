"""The parts of the main job: settings, tasks, stages, evaluation and the run's folder."""
