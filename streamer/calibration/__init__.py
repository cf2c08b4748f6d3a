"""The aligned model run over calibration data, layer by layer: Gram matrices and factors."""
