"""What a row is: its modules' factors, projections, sketches and width."""
