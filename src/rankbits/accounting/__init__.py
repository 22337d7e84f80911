"""What it costs: matrix products, parameters and bytes, as plain integers. Only `measure` knows torch."""
