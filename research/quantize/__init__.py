"""Few bits: formats, calibration, baselines and CBQ."""
