"""The one error that a measurement raises when it cannot be made on this network and data."""


class MeasurementError(RuntimeError):
    """A curvature number cannot be had here; the message says why and what to do.

    Monitors catch it, record the failure and let training go on.
    """
