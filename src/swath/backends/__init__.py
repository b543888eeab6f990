"""What runs a checked call: a folder for each backend, a module for each operator in it.

``swath.dispatch`` finds ``backends/<backend>/<operator>.py``. Imports go one way: hopper -> gluon -> triton -> device;
``cpu`` and ``reference`` stand apart.
"""
