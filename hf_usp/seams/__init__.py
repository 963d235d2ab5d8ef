"""What happens to an Accelerator besides sharding models: rows, gathering, token counts, DeepSpeed, the degree."""
