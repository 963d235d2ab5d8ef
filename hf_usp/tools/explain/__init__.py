"""`hf-usp explain`: who holds which token, who computes what and sends what to whom, as text, picture and page."""
