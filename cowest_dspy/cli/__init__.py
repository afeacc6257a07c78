"""The command `cowest`: one verb for each stage of a run."""
