"""`generate` of a prepared model: whole, by rows, or with the prompt's keys and values sharded."""
