"""Each benchmark measures us and what a user would use instead, alternating in one run; see README.md here."""
