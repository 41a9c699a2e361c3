"""Floor 3, what a person drives: the ``ird`` command, the stage graph, registry, restore and reports."""
