"""The report of a conversion: one HTML file of what was asked for, what came out and what was measured."""
