"""Zero-shot quantization: no data are needed."""
