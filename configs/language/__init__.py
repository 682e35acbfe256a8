"""Language models: small ones trained from nothing on the text at hand."""
