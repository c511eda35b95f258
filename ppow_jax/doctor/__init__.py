"""What lowers the acceptance of a drafter, looked for cause by cause."""
