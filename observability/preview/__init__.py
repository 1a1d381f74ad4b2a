"""The dashboards as pages that need no Grafana, drawn by Grafana's own components."""
