"""What both pipelines stand on: settings, database routing, the data contract, migrations."""
