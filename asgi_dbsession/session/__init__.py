"""How one session is used by one caller at a time, and how its work ends."""
