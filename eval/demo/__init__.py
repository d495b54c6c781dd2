"""The demo: real pictures, two small VAEs, two small transformers, one page."""
