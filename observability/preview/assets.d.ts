// What the bundler makes of files that are no code.
declare module '*.css';
declare module '*.svg' {
  const text: string;
  export default text;
}
