// esbuild gives an .mjs module the whole CommonJS module as its default import, as Node does; Grafana's table then has
// an object for a component. This module stands in for react-custom-scrollbars-2 and has the right one.
export { Scrollbars as default } from './node_modules/react-custom-scrollbars-2';
