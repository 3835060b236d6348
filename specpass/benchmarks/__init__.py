"""Quality and speed beside other implementations: what `specpass bench` runs. Importing this loads no torch."""
