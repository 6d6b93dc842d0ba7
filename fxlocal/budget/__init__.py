"""Plans for a budget of memory and time: what each is predicted to take, and what it takes."""
