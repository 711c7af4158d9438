"""How much each candidate type would hurt each expert: the real quantizer's error, priced."""
