"""A run's page: one HTML file to read in a browser and to send to somebody."""
