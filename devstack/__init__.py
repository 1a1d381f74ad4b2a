"""A real stack on one machine: Postgres, S3 and Google Calendar as local servers, demo data, and the demo itself."""
