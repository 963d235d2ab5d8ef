"""Who holds, sees and sends which token: integers only, no torch."""
