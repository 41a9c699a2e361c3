"""Models in the MLflow registry: one version holds all variants, loads without ird, and says where it comes from.

::

    server.py      asking MLflow: what is not there, and what does not answer, is said in a line or two
    packaging.py   an export and our code that it needs, as an MLflow pyfunc
    pushing.py     a new version, checked after its upload
    pulling.py     a version to a local folder, resumed and checked file by file, and found again offline
    versions.py    what versions there are, and all that is known of one
    promotion.py   aliases, the gate in front of them, and the way back
    commands.py    ird registry
"""
